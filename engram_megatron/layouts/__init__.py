"""The proof that every parallel layout trains the same model: small runs of each against one rank."""
