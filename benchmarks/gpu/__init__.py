"""Speed and reports of the GPU check."""
