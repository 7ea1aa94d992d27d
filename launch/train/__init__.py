"""Training programs: the demo, and digit recognition at any model size under Horovod."""
