"""What moves the parameters: Muon and Adam for the backbone, row Adam for the tables, and the schedule of both."""
