"""From stars with labels to a checkpoint: recipes, the Trainer, fine-tuning, and what one compares with."""
