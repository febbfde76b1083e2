"""Knowledge distillation with joint data augmentation from precomputed soft labels."""
