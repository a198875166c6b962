"""The commands, one file each: arguments are parsed before anything heavy is imported."""
