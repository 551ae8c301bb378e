//! Directories that take one another's place, and what is in the way of that.

use super::*;

/// A directory that goes with the test.
struct Scratch(PathBuf);

impl Scratch {
    fn new(name: &str) -> Self {
        let path = std::env::temp_dir();
        let path = path.join(format!("dormouse-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).unwrap();
        Self(path)
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(&self.0).unwrap();
        let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
        let mut names: Vec<_> = names.collect();
        names.sort();
        names
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn save(target: &Path, content: &str) -> Result<(), DirectoryError> {
    let staging = Staging::begin(target)?;
    drop(staging.create(&memory_name(0))?);
    fs::write(staging.path(STATE), content).unwrap();
    staging.commit(true)
}

#[test]
fn a_snapshot_takes_its_place_and_that_of_another() {
    let scratch = Scratch::new("replace");
    let target = scratch.0.join("base");
    for content in ["one", "two", "three"] {
        save(&target, content).unwrap();
        assert_eq!(fs::read_to_string(target.join(STATE)).unwrap(), content);
        assert_eq!(scratch.names(), ["base"]);
    }
    // An empty directory is a place too.
    let empty = scratch.0.join("empty");
    fs::create_dir(&empty).unwrap();
    save(&empty, "four").unwrap();
    assert_eq!(scratch.names(), ["base", "empty"]);
}

#[test]
fn a_link_to_a_snapshot_is_followed_and_stays() {
    let scratch = Scratch::new("link");
    let target = scratch.0.join("base");
    save(&target, "one").unwrap();
    let link = scratch.0.join("latest");
    std::os::unix::fs::symlink("base", &link).unwrap();
    save(&link, "two").unwrap();
    assert_eq!(fs::read_to_string(target.join(STATE)).unwrap(), "two");
    assert_eq!(scratch.names(), ["base", "latest"]);
    assert!(link.is_symlink());
}

#[test]
fn the_part_of_a_note_does_not_stop_the_next_save() {
    let scratch = Scratch::new("part");
    let target = scratch.0.join("base");
    save(&target, "one").unwrap();
    fs::write(target.join(format!("{WRITTEN}.{:032x}", 7)), "half").unwrap();
    save(&target, "two").unwrap();
    assert_eq!(scratch.names(), ["base"]);
    fs::write(target.join(format!("{WRITTEN}.txt")), "mine").unwrap();
    save(&target, "three").unwrap_err();
}

#[test]
fn many_saves_to_one_place_at_once_all_succeed_and_leave_one() {
    let scratch = Scratch::new("many");
    let target = scratch.0.join("base");
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| (0..200).for_each(|_| save(&target, "whole").unwrap()));
        }
    });
    assert_eq!(fs::read_to_string(target.join(STATE)).unwrap(), "whole");
    assert_eq!(scratch.names(), ["base"]);
}

#[test]
fn a_directory_shows_its_own_files_only_and_knows_when_it_was_replaced() {
    let scratch = Scratch::new("own");
    let target = scratch.0.join("base");
    save(&target, "one").unwrap();
    std::os::unix::fs::symlink("/etc/passwd", target.join("disk-0")).unwrap();
    fs::create_dir(target.join("disk-1")).unwrap();
    let open = OpenDirectory::open(&target).unwrap();
    assert_eq!(open.file("disk-0").unwrap_err().to_string(), "a symbolic link");
    assert_eq!(open.file("disk-1").unwrap_err().to_string(), "not a regular file");
    open.file(STATE).unwrap();
    fs::remove_dir(target.join("disk-1")).unwrap();
    assert!(open.is_in_place());
    save(&target, "two").unwrap();
    assert!(!open.is_in_place());
}

#[test]
fn one_that_is_given_up_leaves_what_was_there() {
    let scratch = Scratch::new("given-up");
    let target = scratch.0.join("base");
    save(&target, "old").unwrap();
    let staging = Staging::begin(&target).unwrap();
    drop(staging.create(STATE).unwrap());
    assert_eq!(scratch.names().len(), 2);
    drop(staging);
    assert_eq!(scratch.names(), ["base"]);
    assert_eq!(fs::read_to_string(target.join(STATE)).unwrap(), "old");
}

#[test]
fn what_a_killed_process_left_goes_with_the_next_save() {
    let scratch = Scratch::new("abandoned");
    let abandoned = scratch.0.join(".base.partial-1-0");
    fs::create_dir(&abandoned).unwrap();
    fs::write(abandoned.join(STATE), "half").unwrap();
    let target = scratch.0.join("base");
    let alive = Staging::begin(&target).unwrap();
    assert!(!abandoned.exists());
    save(&target, "new").unwrap();
    assert!(alive.path(".").exists(), "another save of this process was taken away");
}

#[test]
fn directories_with_other_things_are_never_replaced() {
    let scratch = Scratch::new("foreign");
    fs::write(scratch.0.join("thesis.txt"), "years of work").unwrap();
    let refusal = save(&scratch.0, "new").unwrap_err().to_string();
    assert!(refusal.contains("thesis.txt"), "{refusal}");
    let refusal = save(&scratch.0.join("thesis.txt"), "new").unwrap_err().to_string();
    assert!(refusal.contains("not a directory"), "{refusal}");
    for path in ["/", "..", "."] {
        assert!(save(Path::new(path), "new").is_err());
    }
    assert_eq!(scratch.names(), ["thesis.txt"]);
}

#[test]
fn a_link_or_a_fifo_with_the_name_of_what_was_abandoned_is_left_alone() {
    let scratch = Scratch::new("planted");
    let other = scratch.0.join("other");
    save(&other, "of somebody else").unwrap();
    let link = scratch.0.join(".base.partial-1-0");
    std::os::unix::fs::symlink(&other, &link).unwrap();
    let fifo = scratch.0.join(".base.partial-1-1");
    let made = std::process::Command::new("mkfifo").arg(&fifo).status().unwrap();
    assert!(made.success());
    // Neither followed nor waited for.
    save(&scratch.0.join("base"), "new").unwrap();
    assert_eq!(fs::read_to_string(other.join(STATE)).unwrap(), "of somebody else");
    assert!(other.join(memory_name(0)).exists() && link.is_symlink() && fifo.exists());
}

#[test]
fn a_link_that_leads_nowhere_is_refused_and_stays() {
    let scratch = Scratch::new("nowhere");
    let link = scratch.0.join("latest");
    std::os::unix::fs::symlink("gone", &link).unwrap();
    let refusal = save(&link, "new").unwrap_err().to_string();
    assert!(refusal.contains("follow the link"), "{refusal}");
    assert_eq!(scratch.names(), ["latest"]);
}
