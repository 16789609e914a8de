"""From documents and videos to shards: listing, packing, cutting, encoding; called by `data_tools/`."""
