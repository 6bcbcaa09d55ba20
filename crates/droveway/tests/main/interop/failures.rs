//! What does not fit fails as the standard says: with the right Notify on the wire, a line in the gateway's log that says
//! what is wrong, and another try that succeeds once it is mended.

use droveway::lab::capture::What;
use ike::wire::NotifyType;
use rcgen::date_time_ymd;

use super::matrix::{DEAF, HEARS};
use super::{BOX, BOX_ID, Field, SECRET, Trust};
use crate::charon::{Authority, Certified, Charon, Connection, Key, Proof, Settings};
use crate::support::{LIMIT, until};
use crate::watch::Watch;

/// Something that does not fit.
struct Misfit {
    what: &'static str,
    /// Makes of a good connection one that does not fit.
    spoil: Box<dyn Fn(&mut Connection)>,
    /// What charon writes of it when the gateway has begun, and when it has begun itself: the Notify that it sent or got.
    charon: [&'static str; 2],
    /// The same Notify where it is in clear.
    in_clear: Option<NotifyType>,
    /// What the gateway's log says, whoever has begun.
    ours: [&'static str; 2],
    /// Whether it is told to begin anew: by itself it asks for such a child again after half a minute.
    reset: [bool; 2],
}

fn fails_and_is_mended(
    field: &Field,
    charon: &mut Charon<'_>,
    watch: &mut Watch,
    good: &Connection,
    trust: &Trust,
    misfit: &Misfit,
) {
    let mut bad = good.clone();
    (misfit.spoil)(&mut bad);
    for it_begins in [false, true] {
        let side = usize::from(it_begins);
        println!("{}, {}", misfit.what, if it_begins { "it begins" } else { "we begin" });
        charon.load(&bad);
        let (before, since, told) = (watch.report(), charon.log().len(), field.log().len());
        if it_begins {
            field.lab.check(BOX, &["nft", DEAF]).unwrap();
        }
        field.join(trust);
        if it_begins {
            until(LIMIT, "the gateway knows the peer", || field.tunnel().is_some());
            charon.initiate(BOX).unwrap_err();
        }
        charon.says(since, misfit.charon[side]);
        let mut log = String::new();
        until(LIMIT, &format!("the gateway says {:?}", misfit.ours[side]), || {
            log = field.log().split_off(told);
            log.lines().any(|line| line.contains("WARN") && line.contains(misfit.ours[side]))
        });
        assert!(!log.contains(SECRET), "{log}");
        if let Some(notify) = misfit.in_clear {
            let seen = watch.sealed().since(&before);
            let by = if it_begins { "h1" } else { BOX };
            let refused = seen.count(|flow| {
                let refusal = What::Ike { exchange: 34, response: true, notify: Some(notify.into()) };
                flow.what == refusal && flow.node == by
            });
            assert!(refused > 0, "{seen}");
        }
        assert!(!field.both_ways(watch), "nothing gets through");
        let seen = watch.sealed().since(&before);
        let esp = seen.count(|flow| flow.node == "h1" && matches!(flow.what, What::Esp { .. }));
        assert_eq!(esp, 0, "{seen}");
        if it_begins {
            field.lab.check(BOX, &["nft", HEARS]).unwrap();
        }
        charon.load(good);
        if misfit.reset[side] {
            field.lab.check("h1", &["droveway", "tunnel", "reset", BOX]).unwrap();
        }
        let waited =
            until(LIMIT * 2, "it comes up", || charon.sas(BOX).iter().any(|sa| !sa.children.is_empty()));
        println!("  mended, it is up after {waited:?}");
        field.up();
        assert!(field.both_ways(watch));
        field.part(charon);
    }
}

fn all(misfits: Vec<Misfit>, trust: &Trust) {
    let field = Field::new();
    let mut watch = Watch::begin(&field.lab);
    let mut charon = field.charon(Settings::default());
    let good = field.connection(trust);
    for misfit in misfits {
        fails_and_is_mended(&field, &mut charon, &mut watch, &good, trust, &misfit);
    }
}

#[test]
fn a_wrong_secret_is_an_authentication_failure_and_a_wrong_name_too() {
    let named = |name: &'static str| move |it: &mut Connection| it.ours.0 = name.to_owned();
    let misfits = vec![
        Misfit {
            what: "wrong secret",
            spoil: Box::new(|it| {
                for party in [&mut it.ours, &mut it.theirs] {
                    party.1 = Proof::Psk("incorrect horse battery staple".to_owned());
                }
            }),
            charon: [
                "generating IKE_AUTH response 1 [ N(AUTH_FAILED) ]",
                "received AUTHENTICATION_FAILED notify error",
            ],
            in_clear: None,
            ours: ["AUTHENTICATION_FAILED", "the pre-shared keys differ"],
            reset: [false; 2],
        },
        Misfit {
            what: "another name",
            spoil: Box::new(named("other.example")),
            charon: [
                "generating IKE_AUTH response 1 [ N(AUTH_FAILED) ]",
                "received AUTHENTICATION_FAILED notify error",
            ],
            in_clear: None,
            ours: ["AUTHENTICATION_FAILED", "other.example"],
            reset: [false; 2],
        },
    ];
    all(misfits, &Trust::Psk);
}

#[test]
fn suites_and_selectors_without_anything_in_common_are_refused_as_such() {
    let misfits = vec![
        Misfit {
            what: "no common proposal for IKE",
            spoil: Box::new(|it| it.ike = "aes256-sha256-ecp521".to_owned()),
            charon: ["received proposals unacceptable", "received NO_PROPOSAL_CHOSEN notify error"],
            in_clear: Some(NotifyType::NoProposalChosen),
            ours: ["no tunnel: no cipher suite in common", "refused: no cipher suite in common"],
            reset: [false; 2],
        },
        Misfit {
            what: "no common proposal for ESP",
            spoil: Box::new(|it| it.esp = "aes256-sha256".to_owned()),
            charon: ["no acceptable proposal found", "received NO_PROPOSAL_CHOSEN notify, no CHILD_SA built"],
            in_clear: None,
            ours: ["network safe: no cipher suite in common", "network safe: no cipher suite in common"],
            reset: [true; 2],
        },
        Misfit {
            what: "selectors that do not fit",
            spoil: Box::new(|it| it.local_ts = vec!["192.168.99.0/24".to_owned()]),
            charon: ["traffic selectors", "received TS_UNACCEPTABLE notify, no CHILD_SA built"],
            in_clear: None,
            ours: ["network safe: ", "TS_UNACCEPTABLE"],
            reset: [false, true],
        },
    ];
    all(misfits, &Trust::Psk);
}

#[test]
fn a_certificate_that_has_expired_or_is_of_another_ca_is_refused() {
    let ca = Authority::new("CA of the box");
    let good = ca.certify(BOX_ID, Key::EcdsaP256);
    let expired = ca.certify_with(BOX_ID, Key::EcdsaP256, |params| {
        params.not_before = date_time_ymd(2020, 1, 1);
        params.not_after = date_time_ymd(2021, 1, 1);
    });
    let elsewhere = Authority::new("CA of somebody else").der();
    let strange = Authority::new("Another CA").certify(BOX_ID, Key::EcdsaP256);
    let other_name = ca.certify("other.example", Key::EcdsaP256);
    let with =
        |certified: Certified| move |it: &mut Connection| it.ours.1 = Proof::Certificate(certified.clone());
    let refused = |what, certified, ours| Misfit {
        what,
        spoil: Box::new(with(certified)),
        charon: ["N(AUTH_FAILED)", "received AUTHENTICATION_FAILED notify error"],
        in_clear: None,
        ours: [ours; 2],
        reset: [false; 2],
    };
    let misfits = vec![
        refused("expired", expired, "has expired"),
        refused("of another CA", strange, "does not chain to the CA"),
        refused("for another name", other_name, "does not name"),
        Misfit {
            what: "charon trusts another CA",
            spoil: Box::new(move |it| it.theirs.1 = Proof::SignedBy(elsewhere.clone())),
            charon: ["constraint check failed"; 2],
            in_clear: None,
            ours: ["AUTHENTICATION_FAILED"; 2],
            reset: [false; 2],
        },
    ];
    all(misfits, &Trust::Certificates(Box::new((ca, good))));
}
