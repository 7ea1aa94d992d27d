"""Programs that measure; their tables and plots go to `launch/results`."""
