"""What a run would need, by formula: memory, traffic and operations of every stage of a stream, before it starts."""
