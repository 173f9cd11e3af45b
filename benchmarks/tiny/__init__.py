"""A two-million-parameter nemotron_h model that does arithmetic by writing out its steps: data, training, export."""
