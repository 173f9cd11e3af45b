"""Who runs when, with which pages and which slot: integers only, never a tensor."""
