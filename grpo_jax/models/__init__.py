"""The language model: configuration, decoder and adapters."""
