"""The engine: protocol, torch and fake implementations, scheduler, sampler."""
