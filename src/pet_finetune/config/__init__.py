"""The options of a run: schema, loading, overrides and legacy spellings."""
