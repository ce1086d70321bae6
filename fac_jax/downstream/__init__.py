"""Does the new data help? A classifier trained with and without it, measured on documents never trained on."""
