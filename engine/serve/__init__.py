"""The HTTP door: `headrace serve` and any OpenAI client. What it must do stands in contract sections 1 to 5."""
