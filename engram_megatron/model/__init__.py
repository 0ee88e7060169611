"""The network: the backbone's layers and the Engram layer that feeds it memory."""
