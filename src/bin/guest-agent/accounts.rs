//! Users and groups, by the guest's /etc/passwd and /etc/group.

use std::fs;
use std::path::Path;

use crate::protocol::{Failure, FailureKind};

/// Who a program runs as.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Account {
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// All its groups, `gid` among them.
    pub(crate) groups: Vec<u32>,
    /// Its home directory.
    pub(crate) home: String,
}

/// Root's home directory, where nobody says another.
pub(crate) const ROOTS_HOME: &str = "/root";

impl Account {
    /// Finds `user`, `uid`, `user:group` or `uid:gid`.
    pub(crate) fn find(spec: &str) -> Result<Self, Failure> {
        // Where a file is not there, numbers will do.
        let read = |path: &Path| {
            let bytes = fs::read(path).unwrap_or_default();
            String::from_utf8_lossy(&bytes).into_owned()
        };
        let (passwd, group) = (read(Path::new("/etc/passwd")), read(Path::new("/etc/group")));
        Self::find_in(spec, &passwd, &group)
    }

    fn find_in(spec: &str, passwd: &str, group: &str) -> Result<Self, Failure> {
        let (user, group_name) = match spec.split_once(':') {
            Some((user, group)) => (user, Some(group)),
            None => (spec, None),
        };
        // name:password:uid:gid:comment:home:shell
        let mut entry = lines(passwd).find(|fields| fields.first() == Some(&user));
        let number = |at: usize| id(entry.as_ref()?.get(at)?);
        let named = number(2).zip(number(3));
        let (uid, primary) = match (named, id(user)) {
            (Some(found), _) => found,
            (None, Some(uid)) => {
                entry = lines(passwd).find(|fields| fields.get(2) == Some(&user));
                let gid = entry.as_ref().and_then(|fields| id(fields.get(3)?));
                (uid, gid.unwrap_or(0))
            }
            (None, None) => return Err(not_found("user", user, "/etc/passwd")),
        };
        let home = entry.and_then(|fields| fields.get(5).copied()).filter(|home| !home.is_empty());
        let home = home.unwrap_or(if uid == 0 { ROOTS_HOME } else { "/" }).to_owned();
        let gid = match group_name {
            None => primary,
            Some(name) => {
                let entry = lines(group).find(|fields| fields.first() == Some(&name));
                let found = entry.and_then(|fields| id(fields.get(2)?));
                found.or_else(|| id(name)).ok_or_else(|| not_found("group", name, "/etc/group"))?
            }
        };
        let mut groups = vec![gid];
        if named.is_some() {
            groups.extend(supplementary(user, group).filter(|&other| other != gid));
        }
        Ok(Self { uid, gid, groups, home })
    }
}

/// A number of a user or group. The last one is none: to the kernel it says "as before", which is root.
fn id(text: &str) -> Option<u32> {
    text.parse().ok().filter(|&id| id != u32::MAX)
}

fn not_found(what: &str, name: &str, list: &str) -> Failure {
    Failure::new(
        FailureKind::NotFound,
        format!("no {what} {name:?} in the guest's {list} (a number needs no entry)"),
    )
}

fn lines(text: &str) -> impl Iterator<Item = Vec<&str>> {
    text.lines().map(|line| line.split(':').collect())
}

/// The groups that name the user as a member: name:password:gid:member,member…
fn supplementary(user: &str, group: &str) -> impl Iterator<Item = u32> {
    lines(group).filter_map(move |fields| {
        let is_member = fields.get(3)?.split(',').any(|member| member == user);
        if is_member { id(fields.get(2)?) } else { None }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/sh\n\nweb:x:33:34::/var/www:/bin/false\n77:x:78:79:::\n";
    const GROUP: &str = "root:x:0:\nweb:x:34:\nlog:x:4:adm,web\nbad:x:no:web\nssl:x:101:web\n";

    #[test]
    fn users_and_groups_are_found_by_name_and_by_number() {
        let cases: &[(&str, u32, u32, &[u32], &str)] = &[
            ("root", 0, 0, &[0], "/root"),
            ("0:4", 0, 4, &[4], "/root"),
            ("web", 33, 34, &[34, 4, 101], "/var/www"),
            ("web:log", 33, 4, &[4, 101], "/var/www"),
            ("33", 33, 34, &[34], "/var/www"),
            ("33:4", 33, 4, &[4], "/var/www"),
            ("1234", 1234, 0, &[0], "/"),
            ("1234:ssl", 1234, 101, &[101], "/"),
            // A name comes before a number, and a home has one.
            ("77", 78, 79, &[79], "/"),
        ];
        for (spec, uid, gid, groups, home) in cases {
            let groups = groups.to_vec();
            let account = Account { uid: *uid, gid: *gid, groups, home: (*home).to_owned() };
            assert_eq!(Account::find_in(spec, PASSWD, GROUP).as_ref(), Ok(&account), "{spec}");
        }
        let bare = Account::find_in("0", "", "").unwrap();
        assert_eq!((bare.uid, bare.home.as_str()), (0, ROOTS_HOME));
        let last = ["4294967295", "0:4294967295", "last", "4294967295:4"];
        let others = ["nobody", "", "web:", "web:nogroup", "-1", "4294967296", ":web"];
        let passwd = format!("{PASSWD}last:x:4294967295:4::/:/bin/sh\n");
        for spec in others.into_iter().chain(last) {
            let failure = Account::find_in(spec, &passwd, GROUP).unwrap_err();
            assert_eq!(failure.kind, FailureKind::NotFound, "{spec}");
            assert!(failure.what.starts_with("no "), "{failure:?}");
        }
    }
}
