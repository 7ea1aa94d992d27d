"""Programs that people run; nothing below this directory imports from it."""
