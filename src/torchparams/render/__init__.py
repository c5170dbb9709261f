"""From what a verb has to say to what a person sees or a program reads: terminal, JSON, progress."""
