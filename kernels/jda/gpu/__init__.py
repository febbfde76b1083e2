"""The same in Triton, for batches of images in a GPU's memory."""
