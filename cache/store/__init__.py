"""The store: a zarr group of blocks, each written once by one process and committed last."""
