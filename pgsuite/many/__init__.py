"""Several independent runs in one process, as one computation."""
