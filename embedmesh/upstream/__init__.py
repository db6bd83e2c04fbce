"""HTTP towards nodes and servers of other makes: connections, replies, streams, and what a refusal means."""
