"""States of resumable streams: their stores (`store`, `redis_store`) and their protection (`sealing`)."""
