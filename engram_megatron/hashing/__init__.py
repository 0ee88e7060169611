"""From token ids to rows: vocabulary projection V -> V', head sizes (primes), n-gram hash."""
