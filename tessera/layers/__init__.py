"""Tensors to tensors: the parts networks are made of, each stating its own multiply-adds."""
