"""Backends, which run the model's graphs: the interface in `base`, implementations in `cpu` and `gpu`."""
