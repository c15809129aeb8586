"""What prefill and decode workers share: outputs, stores, readiness, state, the process."""
