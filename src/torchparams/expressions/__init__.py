"""What a row of a table is made of: tensors as they are stored, and operations on them."""
