"""gRPC servers and channels, and the interceptors every service shares."""
