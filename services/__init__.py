"""The four services. They share the library `splitserve` and never import each other."""
