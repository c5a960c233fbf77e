"""What a run measured, as a page with plots and as a model card."""
