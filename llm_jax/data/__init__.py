"""Text in, rows out: documents, encoding, shards, packing, mixture, loader; and prepare."""
