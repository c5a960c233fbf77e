"""What a run keeps in its work_dir: journal, lock, state, and which tensor lies in which shard."""
