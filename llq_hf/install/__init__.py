"""What only installers read: the build hook of the wheel, the start-up files, optimum's plug-in."""
