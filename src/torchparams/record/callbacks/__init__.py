"""Callbacks that run a recorder inside the trainers of other libraries."""
