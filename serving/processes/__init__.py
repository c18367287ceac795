"""A server of several processes: a supervisor, one engine, and the transports, which serve the protocols."""
