"""The three stages. Each plans, then reads, computes, writes and journals unit by unit; none imports another."""
