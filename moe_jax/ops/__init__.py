"""Pure functions on arrays: no Flax, mesh, configuration, logging or globals."""
