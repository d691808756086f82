"""The building blocks of networks, each of which counts its own multiply-adds."""
