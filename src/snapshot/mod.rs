mod directory;
mod format;
