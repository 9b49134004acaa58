"""What ``stagemesh detect`` needs of MLX: pipelines in one process, and faults to put into them."""
