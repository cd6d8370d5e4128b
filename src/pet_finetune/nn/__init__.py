"""Building blocks of the Point Edge Transformer: tensors in, tensors out."""
