use super::*;

const PASSWD_TEXT: &str = "\
# comment:x:5:5::/:/bin/sh
root:x:0:0:root:/root:/bin/sh
bot:x:1000:1001::/home/bot:/bin/sh
toor:x:0:0::/toor:/bin/sh
short:x:7
::8:8::/:
wrapped:x:4294967296:0::/:
negative:x:-1:0::/:
relative:x:1002:1002::home:/bin/sh
bot:x:2000:2000::/second:/bin/sh
1005:x:1006:1006::/odd:/bin/sh
no-home:x:1003:1003
";
const GROUP_TEXT: &str = "\
root:x:0:
bot:x:1001:
docker:x:999:root,bot
wheel:x:10:bot
wheel2:x:11:robot,botx
broken:x:
audio:x:29:bot,
";

fn security(uid: Option<i64>, gid: Option<i64>, non_root: bool) -> SecurityContext {
    SecurityContext {
        run_as_user: uid,
        run_as_group: gid,
        run_as_non_root: non_root.then_some(true),
        ..SecurityContext::default()
    }
}

fn chosen(image_user: &str, s: &SecurityContext) -> Result<User, UserError> {
    choose(PASSWD_TEXT.as_bytes(), GROUP_TEXT.as_bytes(), image_user, Some(s))
}

#[test]
fn the_user_is_the_specs_else_the_images() {
    for (image, uid, gid, result) in [
        ("", None, None, (0, 0, vec![0, 999], Some("/root"))),
        ("root", None, None, (0, 0, vec![0, 999], Some("/root"))),
        ("0", None, None, (0, 0, vec![0, 999], Some("/root"))),
        ("bot", None, None, (1000, 1001, vec![10, 29, 999, 1001], Some("/home/bot"))),
        ("1000", None, None, (1000, 1001, vec![10, 29, 999, 1001], Some("/home/bot"))),
        ("bot:wheel", None, None, (1000, 10, vec![10, 29, 999], Some("/home/bot"))),
        ("bot:77", None, None, (1000, 77, vec![10, 29, 77, 999], Some("/home/bot"))),
        ("1234", None, None, (1234, 0, vec![0], None)),
        ("1234:5678", None, None, (1234, 5678, vec![5678], None)),
        ("1005", None, None, (1005, 0, vec![0], None)),
        ("relative", None, None, (1002, 1002, vec![1002], None)),
        ("no-home", None, None, (1003, 1003, vec![1003], None)),
        ("2147483647", None, None, (2_147_483_647, 0, vec![0], None)),
        ("", Some(1000), None, (1000, 1001, vec![10, 29, 999, 1001], Some("/home/bot"))),
        ("root:wheel", Some(1000), None, (1000, 1001, vec![10, 29, 999, 1001], Some("/home/bot"))),
        ("nobody-knows", Some(1234), None, (1234, 0, vec![0], None)),
        ("bot", None, Some(5), (1000, 5, vec![5, 10, 29, 999], Some("/home/bot"))),
        ("bot:nobody-knows", None, Some(5), (1000, 5, vec![5, 10, 29, 999], Some("/home/bot"))),
        ("", None, Some(5), (0, 5, vec![5, 999], Some("/root"))),
        ("", Some(1234), Some(5), (1234, 5, vec![5], None)),
    ] {
        let made = chosen(image, &security(uid, gid, false)).unwrap_or_else(|e| panic!("{image:?}: {e}"));
        let (uid, gid, additional_gids, home) = result;
        assert_eq!(made, User { uid, gid, additional_gids, home: home.map(str::to_owned) }, "{image:?}");
    }
}

#[test]
fn what_is_no_user_is_refused() {
    let refused = |image: &str, s: SecurityContext| chosen(image, &s).unwrap_err();
    let none = || security(None, None, false);
    for image in ["nobody", "short", "wrapped", "negative", "-1", "bot ", " bot", "b", "comment", "# comment"] {
        assert!(matches!(refused(image, none()), UserError::NotThere { kind: "user", .. }), "{image:?}");
    }
    for image in ["bot:nobody", "bot:broken", "0:-1"] {
        assert!(matches!(refused(image, none()), UserError::NotThere { kind: "group", .. }), "{image:?}");
    }
    for image in [":", "bot:", ":bot", "bot:wheel:x", "a\nb", "a\0"] {
        assert!(matches!(refused(image, none()), UserError::Malformed { .. }), "{image:?}");
    }
    // 2^32 must not become root.
    for image in ["4294967296", "2147483648", "4294967295", "99999999999999999999999", "0:4294967296"] {
        assert!(matches!(refused(image, none()), UserError::OutOfRange { .. }), "{image:?}");
    }
    for id in [-1, 1 << 31, 1 << 32, i64::MAX, i64::MIN] {
        assert!(matches!(refused("", security(Some(id), None, false)), UserError::OutOfRange { .. }), "{id}");
        assert!(matches!(refused("", security(None, Some(id), false)), UserError::OutOfRange { .. }), "{id}");
    }
}

#[test]
fn root_is_refused_where_it_must_not_be() {
    for (image, uid) in [("", None), ("0", None), ("root", None), ("toor:wheel", None), ("00", None), ("bot", Some(0))]
    {
        let refused = chosen(image, &security(uid, None, true)).unwrap_err();
        assert!(matches!(refused, UserError::Root { .. }), "{image:?} {uid:?}: {refused}");
        assert_eq!(refused.reason(), Reason::InvalidSpec);
        assert!(!refused.retryable());
    }
    for (image, uid) in [("1000", None), ("bot", None), ("root", Some(1000)), ("", Some(1))] {
        chosen(image, &security(uid, None, true)).unwrap_or_else(|e| panic!("{image:?} {uid:?}: {e}"));
    }
}

#[test]
fn without_passwd_and_group_numbers_still_do() {
    let none = security(None, None, true);
    assert_eq!(choose(b"", b"", "5:6", Some(&none)).unwrap().gid, 6);
    assert_eq!(choose(b"", b"", "", None).unwrap(), User { additional_gids: vec![0], ..User::default() });
    assert!(choose(b"", b"", "root", None).is_err());
}

#[test]
fn garbage_in_the_files_is_passed_over() {
    let mut passwd = vec![0xff; 10];
    passwd.extend(b"\nbot:x:5:6::/b:\n\0\0:x:1:1\n");
    passwd.extend([b'a'; MAX_LINE + 1]);
    passwd.extend(b"\nlast:x:9:9::/l:");
    assert_eq!(choose(&passwd, b"\xff:x:1:bot", "bot", None).unwrap().gid, 6);
    assert_eq!(choose(&passwd, b"", "last", None).unwrap().uid, 9);
}

proptest::proptest! {
    #[test]
    fn no_file_and_no_name_panics(
        passwd in proptest::collection::vec(proptest::sample::select(b"ab:0129\n,#\xff-".to_vec()), 0..200),
        group in proptest::collection::vec(proptest::sample::select(b"ab:0129\n,#\xff-".to_vec()), 0..200),
        image in "[ab0129:]{0,8}",
        non_root: bool,
    ) {
        if let Ok(user) = choose(&passwd, &group, &image, Some(&security(None, None, non_root))) {
            proptest::prop_assert!(!(non_root && user.uid == 0));
            proptest::prop_assert!(user.uid <= i32::MAX as u32 && user.gid <= i32::MAX as u32);
            proptest::prop_assert!(user.additional_gids.contains(&user.gid));
        }
    }
}
