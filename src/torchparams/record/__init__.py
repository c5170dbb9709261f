"""The record of a training: what every parameter does over the steps, and what is read out of it."""
