"""The stages of the network; `fusionsam.models.fusionsam` is the only file that knows their order."""
