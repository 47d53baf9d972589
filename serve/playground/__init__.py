"""A page that shows one prompt at several precisions side by side."""
