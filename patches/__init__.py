"""What hf_flash does to each attention behaviour: one file a behaviour, each registering itself."""
