"""Everything that starts from a configuration: schema, construction, training, resume, evaluation, sweeps, commands."""
