"""Files that only installers read: the wheel's build hook, start-up files, optimum's plug-in."""
