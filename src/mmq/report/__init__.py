"""What a run measured, told to people: status, page, model card, hub."""
